"""What a job takes on devices that are not here."""
