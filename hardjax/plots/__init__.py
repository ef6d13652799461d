"""Pictures, drawn off screen from rows and records alone and returned as Matplotlib figures."""
