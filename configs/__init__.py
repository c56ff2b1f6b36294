"""The YAML and DeepSpeed files, installed beside the code so that a wheel finds them."""
