"""What every command needs and a reader may skip: settings, a run's folder, Hugging Face folders, costs,
devices."""
