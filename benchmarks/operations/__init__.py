"""Operations on this machine: checked, and raced against their peers."""
