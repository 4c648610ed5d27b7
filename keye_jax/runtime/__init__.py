"""Running the model: programs, prefill, decode and sampling, encoding images, and starting several processes."""
