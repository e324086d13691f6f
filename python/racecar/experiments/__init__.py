"""What the demo and the recipes share: their output folder, and whether a difference is more than chance."""
