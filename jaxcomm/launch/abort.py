def install_excepthook(): pass
