"""What a machine makes of the platform (`emcl doctor`), and what a machine without internet needs (`emcl bundle`)."""
