"""What is measured of pictures but is no evaluation of a run, and what evaluations share."""
