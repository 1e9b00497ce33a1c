"""Model cards, what may leave the machine, the push to the Hub, and other formats."""
