from fusion_edge.runtime import signals

signals.leave_while_a_module_loads()
