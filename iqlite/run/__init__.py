"""The run directory, the public interface."""
