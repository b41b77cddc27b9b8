"""What results show: estimates and their intervals, paired tests, main effects, measures and their wording."""
