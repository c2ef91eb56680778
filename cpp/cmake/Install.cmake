# Install and export: find_package(ssmcore) gives ssmcore::ssmcore, wherever the tree is moved.

set(ssmcore_package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/ssmcore)

install(TARGETS ssmcore EXPORT ssmcore-targets)
install(DIRECTORY include/ssmcore ${CMAKE_CURRENT_BINARY_DIR}/include/ssmcore
        DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT ssmcore-targets NAMESPACE ssmcore:: DESTINATION ${ssmcore_package_dir})

configure_package_config_file(
  cmake/ssmcore-config.cmake.in ssmcore-config.cmake INSTALL_DESTINATION ${ssmcore_package_dir})
# Below 1.0 a minor version may change interfaces.
write_basic_package_version_file(ssmcore-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/ssmcore-config.cmake
              ${CMAKE_CURRENT_BINARY_DIR}/ssmcore-config-version.cmake
        DESTINATION ${ssmcore_package_dir})
