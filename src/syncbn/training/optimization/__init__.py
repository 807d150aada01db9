"""What turns gradients into steps: parameter groups, schedules, averages of weights, weights of classes,
and dropout's seeds.
"""
