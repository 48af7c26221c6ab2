"""What the programs cost, side by side with the same computation in PyTorch."""
