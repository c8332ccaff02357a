package cryptohook

import (
	"strings"
	"testing"
	"time"

	"maunium.net/go/mautrix/id"
)

// forwardedKey is the content of an m.forwarded_room_key.
func forwardedKey(t *testing.T, s *megolm, device *actorDevice) object {
	t.Helper()
	return object{
		"algorithm": string(id.AlgorithmMegolmV1), "room_id": s.roomID.String(), "session_id": s.id().String(),
		"session_key": string(exportOf(t, s.key, 0)), "sender_key": device.senderKey().String(),
		"sender_claimed_ed25519_key": device.signingKey().String(), "forwarding_curve25519_key_chain": []any{},
	}
}

// askedFor is a world in which the bot waits for a key and has asked its other device for it.
func askedFor(t *testing.T, change ...func(*Options)) (w *trustWorld, server *accountServer, alice, element *actorDevice, s *megolm, said object) {
	t.Helper()
	w, alice, _ = twoPeople(t, change...)
	server = newAccountServer(w)
	element = w.element()
	s = newMegolm(trustRoom)
	said = w.say(alice, s, "hello")
	w.wait(said)
	w.searchNow()
	if len(server.sent) != 1 {
		t.Fatalf("asked %d times", len(server.sent))
	}
	return w, server, alice, element, s, said
}

func TestOtherDevicesAreAskedForAMissingKey(t *testing.T) {
	w, server, alice, element, s, said := askedFor(t)
	request := server.sent[0]
	body, _ := request.content["body"].(object)
	if request.to != "@bot:test *" || request.content["action"] != "request" || request.content["requesting_device_id"] != "BOTDEVICE" ||
		body["room_id"] != trustRoom.String() || body["session_id"] != s.id().String() || body["algorithm"] != string(id.AlgorithmMegolmV1) {
		t.Errorf("asked %+v", request)
	}
	if _, named := body["sender_key"]; named || len(body) != 3 {
		t.Errorf("asked for %v", body)
	}
	w.changes.take()
	w.sync(syncPart{toDevice: []object{w.olmEvent(element, "m.forwarded_room_key", forwardedKey(t, s, alice))}})
	if changed, _ := w.changes.take(); !changed[s.id()] {
		t.Error("nobody was told of the key")
	}
	w.handle()
	seen := w.sawOne(id.EventID(said["event_id"].(string)))
	wantCode(t, seen, CodeAuthenticityNotGuaranteed)
	if seen.body != "hello" || seen.verdict.Source != SourceForwarded || !seen.verdict.Legacy {
		t.Errorf("read %q: %+v", seen.body, seen.verdict)
	}
	claim := w.row(s, alice)
	if claim.SigningKey != alice.signingKey() || claim.State != StateUnknownDevice || !claim.Legacy {
		t.Errorf("the claim is %+v", claim)
	}
	w.searchNow()
	if len(server.sent) != 2 {
		t.Fatal("the request was not cancelled")
	}
	cancelled := server.sent[1]
	if cancelled.to != "@bot:test *" || cancelled.content["action"] != "request_cancellation" || cancelled.content["request_id"] != request.content["request_id"] ||
		cancelled.content["requesting_device_id"] != "BOTDEVICE" || cancelled.content["body"] != nil {
		t.Errorf("cancelled %+v", cancelled)
	}
	w.searchNow()
	if len(server.sent) != 2 {
		t.Error("the request was cancelled twice")
	}
}

// The key comes from its owner after all: nobody need answer.
func TestRequestIsCancelledWhenTheKeyComesDirectly(t *testing.T) {
	for _, restart := range []bool{false, true} {
		w, server, alice, _, s, _ := askedFor(t)
		if restart {
			w.restart()
		}
		w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
		if restart {
			w.restart()
		}
		w.searchNow()
		if len(server.sent) != 2 || server.sent[1].content["action"] != "request_cancellation" {
			t.Errorf("sent %+v", server.sent)
		}
	}
}

func TestRequestThatFailsIsSentAgainUnderTheSameID(t *testing.T) {
	w, alice, _ := twoPeople(t)
	server := newAccountServer(w)
	w.element()
	s := newMegolm(trustRoom)
	w.wait(w.say(alice, s, "hello"))
	server.down = true
	w.clock.advance(searchDelay)
	if _, err := w.hook.search.pass(w.ctx); err == nil {
		t.Error("the failure is hidden")
	}
	first := must(w.hook.store.keyRequest(w.ctx, s.id()))
	w.restart()
	server.down = false
	w.searchNow()
	if len(server.sent) != 1 || server.sent[0].content["request_id"] != first.requestID {
		t.Errorf("sent %+v, want the request %s", server.sent, first.requestID)
	}
}

// Nobody but a device that our own identity vouches for would be believed.
func TestNobodyIsAskedWhoseAnswerWouldNotBeTaken(t *testing.T) {
	for name, add := range map[string]func(w *trustWorld){
		"there is no other device":        func(*trustWorld) {},
		"the other device is not signed":  func(w *trustWorld) { w.bot.addDevice("OTHER").crossSigned = false },
		"the other device was logged out": func(w *trustWorld) { w.element().unpublished = true },
		"somebody else has signed it": func(w *trustWorld) {
			w.bot.addDevice("OTHER").owner = &actor{userID: w.bot.userID, selfSigning: newActor("@x:test").selfSigning}
		},
	} {
		t.Run(name, func(t *testing.T) {
			w, alice, _ := twoPeople(t)
			server := newAccountServer(w)
			add(w)
			w.know(w.bot)
			w.wait(w.say(alice, newMegolm(trustRoom), "hello"))
			w.searchNow()
			if len(server.sent) != 0 {
				t.Errorf("sent %+v", server.sent)
			}
		})
	}
}

func TestForwardedKeysThatAreNotToBeTaken(t *testing.T) {
	other := newMegolm(trustRoom)
	type world struct {
		*trustWorld
		alice, element *actorDevice
		s              *megolm
	}
	forward := func(change func(content object)) func(w world) object {
		return func(w world) object {
			content := forwardedKey(w.t, w.s, w.alice)
			change(content)
			return w.olmEvent(w.element, "m.forwarded_room_key", content)
		}
	}
	same := func(object) {}
	for name, forge := range map[string]func(w world) object{
		"from another user": func(w world) object {
			return w.olmEvent(w.alice, "m.forwarded_room_key", forwardedKey(w.t, w.s, w.alice))
		},
		"from a device of ours that is not signed": func(w world) object {
			w.element.crossSigned = false
			w.know(w.bot)
			return forward(same)(w)
		},
		"from a device of ours that is signed in the message only": func(w world) object {
			intruder := &actorDevice{owner: w.bot, deviceID: "INTRUDER", account: newActor("@x:test").addDevice("X").account, crossSigned: true}
			return w.olmEvent(intruder, "m.forwarded_room_key", forwardedKey(w.t, w.s, w.alice))
		},
		"from a device of ours that was deleted": func(w world) object {
			w.element.unpublished = true
			w.know(w.bot)
			return forward(same)(w)
		},
		"from a device with another's curve25519 key": func(w world) object {
			evt := forward(same)(w)
			w.element.unpublished = true
			twin := *w.element
			twin.unpublished, twin.deviceID, twin.owner = false, "TWIN", w.bot
			w.bot.devices = append(w.bot.devices, &twin)
			twin.account = newActor("@x:test").addDevice("X").account
			w.know(w.bot)
			return evt
		},
		"too late": func(w world) object {
			w.clock.advance(keepRequests + time.Second)
			return forward(same)(w)
		},
		"of a session that was not asked for": func(w world) object {
			return w.olmEvent(w.element, "m.forwarded_room_key", forwardedKey(w.t, other, w.alice))
		},
		"of another session under this one's ID": forward(func(c object) { c["session_key"] = string(exportOf(t, other.key, 0)) }),
		"for another room":                       forward(func(c object) { c["room_id"] = "!other:test" }),
		"of another algorithm":                   forward(func(c object) { c["algorithm"] = "m.megolm.v9" }),
		"without a sender key":                   forward(func(c object) { delete(c, "sender_key") }),
		"without a claimed key":                  forward(func(c object) { delete(c, "sender_claimed_ed25519_key") }),
		"with a sender key that is none":         forward(func(c object) { c["sender_key"] = strings.Repeat("x", 5000) }),
		"that does not parse":                    forward(func(c object) { c["session_key"] = "AAAA" }),
		"that is not what it should be":          forward(func(c object) { c["session_key"] = 5 }),
		"without a session key":                  forward(func(c object) { delete(c, "session_key") }),
	} {
		t.Run(name, func(t *testing.T) {
			w, _, alice, element, s, _ := askedFor(t)
			evt := forge(world{w, alice, element, s})
			w.sync(syncPart{toDevice: []object{evt}})
			if len(w.claims(s)) > 0 || w.storedKey(s, trustRoom) != nil || w.storedKey(other, trustRoom) != nil {
				t.Error("the key was taken")
			}
			if count := strings.Count(w.log.String(), "Ignoring a forwarded room key"); count != 1 {
				t.Errorf("%d log lines", count)
			}
			if request := must(w.hook.store.keyRequest(w.ctx, s.id())); request == nil || request.answered {
				t.Error("the request counts as answered")
			}
		})
	}
}

func TestForwardedKeyIsTakenOnce(t *testing.T) {
	w, server, alice, element, s, _ := askedFor(t)
	w.sync(syncPart{toDevice: []object{w.olmEvent(element, "m.forwarded_room_key", forwardedKey(t, s, alice))}})
	w.searchNow()
	mallory := newActor("@mallory:test").addDevice("MALLORY")
	w.sync(syncPart{toDevice: []object{w.olmEvent(element, "m.forwarded_room_key", forwardedKey(t, s, mallory))}})
	if claims := w.claims(s); len(claims) != 1 {
		t.Errorf("%d claims", len(claims))
	}
	if len(server.sent) != 2 {
		t.Errorf("sent %+v", server.sent)
	}
}

// What is received is durable, or not at all, whoever sent it.
func TestForwardedKeyIsPartOfTheUnitOfWork(t *testing.T) {
	w, _, alice, element, s, said := askedFor(t)
	resp, _ := w.response(syncPart{toDevice: []object{w.olmEvent(element, "m.forwarded_room_key", forwardedKey(t, s, alice))}})
	if _, err := w.hook.receive(w.ctx, resp); err != nil {
		t.Fatal(err)
	}
	if w.storedKey(s, trustRoom) != nil || len(w.claims(s)) > 0 {
		t.Error("the key was stored before the commit")
	}
	if err := w.hook.uow.flush(w.ctx); err != nil {
		t.Fatal(err)
	}
	w.handle()
	wantCode(t, w.sawOne(id.EventID(said["event_id"].(string))), CodeAuthenticityNotGuaranteed)
}
