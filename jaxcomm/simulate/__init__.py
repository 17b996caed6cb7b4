"""How designs of gradient exchange scale to sizes that are not at hand.

The life of a prediction. A `machines.Machine` holds measured, cited and assumed
numbers, each with a range; a `workloads.Workload` holds a network's leaves, when their
gradients become ready, and the schedule that jaxcomm plans for them. `noise` draws how
devices differ. `experiment` plays steps of six designs on those draws: `dynamic`
negotiates in cycles whose rounds `negotiation` plays message by message (`messages`),
`fixed` reduces buckets in one order. Gradient all-reduces take the time of
`collectives`. `closed` holds the formulas that the simulation is tested against,
`uncertainty` moves parameters inside their ranges, `validation` compares with what was
published, `report` puts all of it into one document.
"""
