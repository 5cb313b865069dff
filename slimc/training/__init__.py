"""Training: one engine that all schedules share, and the network that it trains and cuts in turn."""
