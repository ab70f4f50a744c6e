"""What is kept of the tokens: the wave index, the rows and the steady zone, in one state."""
