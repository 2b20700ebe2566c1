"""What a data set makes of a network: `survey`."""
