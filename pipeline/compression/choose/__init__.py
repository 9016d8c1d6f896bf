"""What chooses: methods and masks, and what they look at."""
