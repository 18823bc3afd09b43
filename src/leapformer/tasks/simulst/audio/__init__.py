"""Audio files and streams, their features, and what training changes in these."""
