"""Starting the processes of a run and watching over them."""
