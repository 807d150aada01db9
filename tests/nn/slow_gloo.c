/* Preloaded: gloo's threads take their time between telling that a work is done and dropping it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <string.h>
#include <unistd.h>

#define NOTIFY_ALL "_ZNSt18condition_variable10notify_allEv" /* std::condition_variable::notify_all() */

void notify_all(void *condition) __asm__(NOTIFY_ALL);

void notify_all(void *condition) {
  static void (*original)(void *);
  if (!original) original = (void (*)(void *))dlsym(dlopen("libstdc++.so.6", RTLD_NOW), NOTIFY_ALL);
  original(condition);
  char name[16];
  pthread_getname_np(pthread_self(), name, sizeof name);
  if (strcmp(name, "pt_gloo_runloop") == 0) {
    static int told;
    if (!told++) (void)!write(STDERR_FILENO, "slow gloo\n", 10);
    usleep(5000);
  }
}
