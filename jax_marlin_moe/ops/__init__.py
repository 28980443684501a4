"""The ops: one file each, in the order public function, shape rule, lowerings, primitive."""
