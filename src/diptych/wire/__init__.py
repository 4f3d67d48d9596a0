"""How processes talk: typed messages, frames, authenticated channels, tickets."""
