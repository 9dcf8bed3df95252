"""What a step costs is taken on random models: a wide one for its memory, layers of it for its time and for the batch that hides streaming."""
