"""What looks at data: compensation, repair, synthetic pictures, and what a network is worth."""
