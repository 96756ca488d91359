"""Whether two frameworks draw the weights of new networks from the same distributions, tensor by tensor."""
