"""What an answer is worth to code, and how sure a mean of such numbers is."""
