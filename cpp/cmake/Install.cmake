# Install and export: find_package(ssmcore) gives ssmcore::ssmcore, wherever the tree is moved.

set(ssmcore_package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/ssmcore)

install(TARGETS ssmcore EXPORT ssmcore-targets)
install(DIRECTORY include/ssmcore ${CMAKE_CURRENT_BINARY_DIR}/include/ssmcore
        DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT ssmcore-targets NAMESPACE ssmcore:: DESTINATION ${ssmcore_package_dir})

# The wheel's OpenBLAS goes beside ssmcore, which finds it there.
set(ssmcore_installed_openblas "")
if(SSMCORE_SCIPY_OPENBLAS)
  get_filename_component(name ${SSMCORE_SCIPY_OPENBLAS} NAME)
  set(ssmcore_installed_openblas ${CMAKE_INSTALL_LIBDIR}/${name})
  install(FILES ${SSMCORE_SCIPY_OPENBLAS} DESTINATION ${CMAKE_INSTALL_LIBDIR})
  set_target_properties(ssmcore PROPERTIES INSTALL_RPATH "$ORIGIN")
endif()

configure_package_config_file(
  cmake/ssmcore-config.cmake.in ssmcore-config.cmake INSTALL_DESTINATION ${ssmcore_package_dir}
  PATH_VARS ssmcore_installed_openblas)
# Below 1.0 a minor version may change interfaces.
write_basic_package_version_file(ssmcore-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/ssmcore-config.cmake
              ${CMAKE_CURRENT_BINARY_DIR}/ssmcore-config-version.cmake
        DESTINATION ${ssmcore_package_dir})
