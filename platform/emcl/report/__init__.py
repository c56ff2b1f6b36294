"""What was found, for people: every inference option in one table, a run's page beside the published figures."""
