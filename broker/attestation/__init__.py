"""How a process and a node are established: the kernel's facts, the contract with attestors, and how they are found."""
