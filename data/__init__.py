"""Making the data files: photographs, pronunciations, and the sample used where there are none."""
