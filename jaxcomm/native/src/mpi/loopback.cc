// Preloaded into mpiexec where a job stays on one host: what would listen on all of the
// host's addresses listens on the loopback address. Open MPI's runtime has no option for it.

#include <dlfcn.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <cstring>

#include "api.h"

JAXCOMM_API int bind(int socket, const sockaddr* address, socklen_t length) {
  using Bind = int (*)(int, const sockaddr*, socklen_t);
  static const Bind original = reinterpret_cast<Bind>(dlsym(RTLD_NEXT, "bind"));
  sockaddr_in v4;
  sockaddr_in6 v6;
  if (address->sa_family == AF_INET && length >= sizeof v4) {
    std::memcpy(&v4, address, sizeof v4);
    if (v4.sin_addr.s_addr == htonl(INADDR_ANY)) v4.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return original(socket, reinterpret_cast<const sockaddr*>(&v4), sizeof v4);
  }
  if (address->sa_family == AF_INET6 && length >= sizeof v6) {
    std::memcpy(&v6, address, sizeof v6);
    if (IN6_IS_ADDR_UNSPECIFIED(&v6.sin6_addr)) v6.sin6_addr = in6addr_loopback;
    return original(socket, reinterpret_cast<const sockaddr*>(&v6), sizeof v6);
  }
  return original(socket, address, length);
}
