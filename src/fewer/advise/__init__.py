"""`fewer advise`: point it at your model, and it tries what applies and says what pays."""
