"""Which network and recipe suit images and time: trainings of equal time, beside plain networks."""
