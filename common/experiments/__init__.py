"""Programs that reproduce a figure of a paper, each with the scripts as they are."""
