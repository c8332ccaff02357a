package soak

import (
	"strings"
	"testing"

	"maunium.net/go/mautrix/crypto/olm"
	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/people"
	"sendertrust/e2e/proxy"
)

// What the homeserver may say about the bot itself.
var liesAboutTheBot = map[string]func(t *testing.T, bot id.UserID) func(answer map[string]any){
	"own device removed": func(_ *testing.T, bot id.UserID) func(map[string]any) {
		return func(answer map[string]any) { object(answer, "device_keys")[bot.String()] = map[string]any{} }
	},
	"own signature removed": func(_ *testing.T, bot id.UserID) func(map[string]any) {
		return func(answer map[string]any) {
			for deviceID, device := range object(answer, "device_keys", bot.String()) {
				signatures := object(device.(map[string]any), "signatures", bot.String())
				for name := range signatures {
					if name != "ed25519:"+deviceID {
						delete(signatures, name)
					}
				}
			}
		}
	},
	"own master key replaced": func(t *testing.T, bot id.UserID) func(map[string]any) {
		forged := must(olm.NewPKSigning())(t).PublicKey().String()
		return func(answer map[string]any) {
			object(answer, "master_keys")[bot.String()] = map[string]any{
				"user_id": bot.String(), "usage": []any{"master"}, "keys": map[string]any{"ed25519:" + forged: forged},
			}
		}
	},
}

// The homeserver lies about the bot itself. From that moment the bot answers nothing, says so once in the room, and answers when the lie
// is over.
func TestLiesAboutTheBotItself(t *testing.T) {
	t.Parallel()
	for name, lie := range liesAboutTheBot {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newLiar(t, theWorld(t), 0)
			s := l.scene(t, name, "held back: the room is told not to rely on the bot, and answered when it is over")
			s.honestly()
			for range often(1, 3) {
				s.tries++
				s.lieAboutTheBot(lie(t, l.bot.UserID))
			}
			if said := count(s.stranger.Notices(s.room), "Do not rely on me"); said != s.tries {
				t.Errorf("the room was told %d times, not %d", said, s.tries)
			}
			s.finish()
		})
	}
}

func (s *scene) lieAboutTheBot(tell func(answer map[string]any)) {
	t := s.t
	told := count(s.stranger.Notices(s.room), "Do not rely on me")
	lying := s.OnAnswer(proxy.KeysQuery, 0, func(request *proxy.Request, answer *proxy.Answer) bool {
		for _, user := range usersIn(request) {
			if user == s.bot.UserID {
				return proxy.Edit(func(answer map[string]any) bool {
					tell(answer)
					return true
				})(request, answer)
			}
		}
		return false
	})
	// Another device of the account comes and goes: the bot looks at itself.
	other := must(people.Login(within(t, patience), s.w.server.URL, s.bot.UserID.String(), password, people.Options{}))(t)
	ok(t, other.Logout(within(t, patience)))
	// It asks one time after the other: at the second answer it has seen the first.
	ok(t, lying.Wait(within(t, patience), 2))
	if len(s.bot.LogMentioning(`"level":"error"`, "What the homeserver publishes about this account is not what we have")) == 0 {
		t.Error("the log does not say so loudly")
	}
	held := []message{s.says(s.verified, true, "verified"), s.says(s.stranger, true, "unverified_identity")}
	ok(t, s.stranger.WaitForNotices(within(t, patience), s.room, func(notices []people.Notice) bool {
		return count(notices, "Do not rely on me") > told
	}))
	for _, m := range held {
		if answers := m.answersOf(s.bot.UserID); len(answers) > 0 {
			t.Errorf("answered as if it were trusted: %+v", answers)
			s.wrong++
		}
	}
	lying.Remove()
	s.hears(held...)
}

// count says how many notices have the words.
func count(notices []people.Notice, words string) (found int) {
	for _, notice := range notices {
		if strings.Contains(notice.Body, words) {
			found++
		}
	}
	return found
}
