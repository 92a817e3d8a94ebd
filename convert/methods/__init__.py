"""GQA, CLA and MLA: what each measures and merges, and the plan that it makes."""
