"""Other trainers on iqlite's work, for comparisons side by side."""
