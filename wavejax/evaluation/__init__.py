"""Comparisons of attentions by answers: tasks, and teacher forcing against full attention."""
