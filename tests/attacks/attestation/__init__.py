"""Attacks on workload attestation: real processes against a real agent on its real socket, in the kernel that is there.

The agent is a process of its own. Attackers and victims are puppets (``puppet.py``): copies of the interpreter, each with a file of its
own, under users of their own where root runs the tests. The policy is one user and one executable, ``wl/victim``. In each test the honest
victim is served, too, and a bystander asks throughout and is served every time. ``ATTACK_SECONDS=600`` gives the storm of A04 its full length.

====  =======================================================================================================
id    tests
====  =======================================================================================================
A01   ``test_baseline``
A02   ``test_pid_rounds`` (racing, after accept, after preface), ``test_moments`` (first byte, between calls, attestation, signature)
A03   ``test_pid_rounds`` (before accept; the two credulous listeners that it fools)
A04   ``test_pid_rounds`` (storm)
A05   ``test_moments`` (sibling, child, victim that became another program)
A06   ``test_names``
A07   ``test_crowds`` (limit, a hundred callers, changed and growing files); a hung file system: ``tests/unit/attestors/test_unix``
A08   ``test_lives`` (zombie, no first thread)
A09   ``test_lives`` (dead giver, living giver, the other way round)
A10   ``test_lives`` (stream), ``test_moments`` (signature), ``tests/unit/agent/test_workloads``
A11   ``test_lives`` (users, groups, capabilities, user namespace, not dumpable)
A12   ``test_namespaces`` (fake root, agent in a user namespace)
A13   ``test_namespaces`` (caller within, agent within, one namespace's numbers in another's /proc)
A14   ``test_namespaces`` (no procfs, another directory over the caller's, hidepid)
A15   ``test_containers`` (forged places, mounts), ``tests/integration/test_docker_engine``, vectors in ``tests/unit/attestation/test_cgroups``
A16   ``test_containers`` (answers, silence, sockets)
A17   ``test_containers`` (labels), ``tests/unit/registry/test_entry`` (no selectors)
A18   ``test_containers`` (image), ``tests/integration/test_docker_engine``
A19   ``tests/unit/transport/test_socket_path``, ``tests/unit/agent/test_listener``
A21   ``test_crowds`` (programs of the exec attestor)
A22   ``tests/unit/agent/test_workloads``; descriptors after A04: ``test_pid_rounds``
A23   ``test_crowds`` (500 processes, 50 users), ``tests/integration/test_agent_server``
A25   ``test_crowds`` (memory), ``tests/integration/test_agent_process``
====  =======================================================================================================

What is left to the attacker, and documented in ``docs/attestors/unix.md``: he who lives as the victim's user may become its program before
the agent accepts; he whom a living victim hands its connection speaks for it; a hard link is the program.
"""
