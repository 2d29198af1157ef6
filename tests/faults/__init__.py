"""Kills, damage, full disks, hostile names, two runs at once: nothing lost, nothing taken on trust."""
