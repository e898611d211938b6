"""What a forward leaves behind about its routing, and the losses and counts that are made of it."""
