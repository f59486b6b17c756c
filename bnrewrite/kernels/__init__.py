"""What replaced norms run on where no single native operator is right for every value."""
