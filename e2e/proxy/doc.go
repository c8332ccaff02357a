// Package proxy stands between a program and its homeserver, and does to the traffic what networks, servers and liars do.
//
//	program ──► toxiproxy ──► hooks ──► homeserver
//
// The network's faults are [Toxic]s: they hold for the whole connection, as [Proxy.Poison] puts them on, or for the way of one answer, as
// [Answer.Break] does. HTTP's faults and lies are hooks: [Proxy.OnRequest] answers in the homeserver's stead, [Proxy.OnAnswer] changes what
// it has answered.
//
//	p, err := proxy.Start(homeserver)
//	defer p.Close()
//	// Every /keys/query says that Alice has a device more:
//	invented := p.OnAnswer(proxy.KeysQuery, 0, proxy.Edit(func(answer map[string]any) bool {
//		devices, _ := answer["device_keys"].(map[string]any)[alice].(map[string]any)
//		if devices == nil {
//			return false // not asked about her: does not count
//		}
//		devices["INVENTED"] = device
//		return true
//	}))
//	…
//	err = invented.Wait(ctx, 1) // it was told once at least
//	invented.Remove()
//
// An answer is kept by [Answer.Clone] and replayed by assigning it: *answer = *kept. It is dropped, after the homeserver has taken the
// request, by answer.Break(proxy.CutAt(0)), and repeated by [Proxy.Repeat]. A hook is called for one request at a time, so it needs no
// lock for what only it touches; it must not wait, and holds an answer back by [Answer.Delay]. Hooks run in the order in which they were
// added, each on what the one before has made.
package proxy

// Patterns name requests: a method and a path below /_matrix/client/, with the wildcards of [path.Match]. "*" for the method is any, and
// [Anything] is every request.
const (
	Anything     = "* **"
	Sync         = "GET v3/sync"
	Filter       = "POST v3/user/*/filter"
	KeysQuery    = "POST v3/keys/query"
	KeysClaim    = "POST v3/keys/claim"
	KeysUpload   = "POST v3/keys/upload"
	SendToDevice = "PUT v3/sendToDevice/*/*"
	Send         = "PUT v3/rooms/*/send/*/*"
	Messages     = "GET v3/rooms/*/messages"
	Members      = "GET v3/rooms/*/members"
	Login        = "POST v3/login"
	Whoami       = "GET v3/account/whoami"
)
