"""What is done to one image: random crops, shifts and colours in training, crops in evaluation."""
