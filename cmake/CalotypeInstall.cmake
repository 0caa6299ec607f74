# cmake --install: the program, the libraries, the headers and a package that
# find_package(calotype CONFIG [COMPONENTS jit]) finds. The code generator is an export set of its own,
# so that a consumer without the component needs no LLVM.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(package_folder ${CMAKE_INSTALL_LIBDIR}/cmake/calotype)
set(base_folders core graph optim layers models diffusion io)
set(jit_folders jit pipelines)

foreach(set base jit)
  set(targets)
  foreach(folder ${${set}_folders})
    if(TARGET calotype_${folder})
      list(APPEND targets calotype_${folder})
      install(DIRECTORY ${folder}/ DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/calotype/${folder}
              FILES_MATCHING PATTERN "*.h" PATTERN "*.def")
    endif()
  endforeach()
  if(targets)
    install(TARGETS ${targets} EXPORT calotype_${set} ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
            INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/calotype)
    install(EXPORT calotype_${set} FILE calotype_${set}.cmake NAMESPACE calotype:: DESTINATION ${package_folder})
  endif()
endforeach()

if(TARGET calotype)
  # USE_LINK_PATH leaves out folders inside the source tree, where .deps/onednn lies.
  set_target_properties(calotype PROPERTIES INSTALL_RPATH_USE_LINK_PATH ON
                        INSTALL_RPATH "$<TARGET_FILE_DIR:DNNL::dnnl>")
  install(TARGETS calotype RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DATADIR}/doc/calotype)

configure_package_config_file(cmake/calotypeConfig.cmake.in ${CMAKE_BINARY_DIR}/calotypeConfig.cmake
                              INSTALL_DESTINATION ${package_folder})
write_basic_package_version_file(${CMAKE_BINARY_DIR}/calotypeConfigVersion.cmake
                                 COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_BINARY_DIR}/calotypeConfig.cmake ${CMAKE_BINARY_DIR}/calotypeConfigVersion.cmake
        DESTINATION ${package_folder})
