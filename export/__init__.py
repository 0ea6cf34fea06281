from fusion_edge.commands import signals

signals.leave_while_a_module_loads()
