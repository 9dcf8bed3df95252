"""What training changed, as something of its own: saved and added up, handed to LoRA servers, a row of a batch each."""
