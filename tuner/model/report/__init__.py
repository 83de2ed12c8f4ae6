"""What is known of a model after it went through: times, memory, errors; as JSON, as a page, in words."""
