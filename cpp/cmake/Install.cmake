# Install and export: find_package(ssmcore) gives ssmcore::ssmcore.
